"""What is between Parry and the machine: files, locks, memory, threads, signals, and libraries and code of others."""
