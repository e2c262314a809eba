"""Entries: what somebody submits, as one folder that others can check without running any code of it."""
