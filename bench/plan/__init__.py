"""From a suite to its cells, each checked before any runs, and the key of each."""
