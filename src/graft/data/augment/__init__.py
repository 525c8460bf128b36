"""Stage `augment`: seeds become chat rows, images become question-and-answer rows, through an OpenAI-compatible API."""
