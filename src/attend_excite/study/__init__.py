"""The user study: which system's images reflect a prompt best, in people's eyes (Table 2 of the paper)."""
