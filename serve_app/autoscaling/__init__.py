"""How many replicas there should be, by the seconds of work that wait; and what that would cost."""
