"""Scripts that each run one engine in the environment that has it; `loop` tells the protocol."""
