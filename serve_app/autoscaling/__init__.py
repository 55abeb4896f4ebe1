"""The scaling policy of a running cluster: the number of replicas that work needs."""
