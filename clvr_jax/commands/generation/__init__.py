"""Commands that run models: generate, sample, verify and serve, with the options that they share."""
