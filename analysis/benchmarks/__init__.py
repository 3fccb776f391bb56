"""VQA benchmarks: questions, answers, accuracy."""
