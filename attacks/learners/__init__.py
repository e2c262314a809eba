"""Learners: attacks on a released data set, each a recipe for training on it all the same."""
