"""The paper's evaluation: prompts, runs, scores and reports, all by way of one folder."""
