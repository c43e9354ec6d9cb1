"""Generative semantic nursing on tensors: objective, schedule and the update of one step."""
