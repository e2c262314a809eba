"""Tasks in, shards out: the runner, its screen, and what a run would cost."""
