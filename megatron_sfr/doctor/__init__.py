"""What `megatron-sfr doctor` checks: this machine, and the nodes of a job against each other."""
