"""All that speaks Ray Serve: the two deployments, and how they find and choose replicas."""
