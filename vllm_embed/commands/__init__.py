"""What `vllm-embed` does, one module a command. What is heavy is imported when a command runs."""
