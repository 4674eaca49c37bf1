"""Load generator, workloads and the tables that `make bench` prints."""
