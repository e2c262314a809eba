"""One cell measured: its pipeline, its attack or learner, the probes of its served model, the judgement."""
