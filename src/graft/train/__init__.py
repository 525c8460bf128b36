"""Training: `accelerate launch -m graft.train RECIPE --stage sft`. Never loads Ray and never tokenizes."""
