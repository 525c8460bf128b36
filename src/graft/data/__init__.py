"""The data plane: augment, prepare, init, shard. Ray Data does the work; torch is imported by `init` alone."""
