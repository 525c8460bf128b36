"""Cleaning for continued pre-training: `document.clean_document` runs the steps, each a function of its own."""
