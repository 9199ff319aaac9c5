"""The libraries that do the heavy work, each behind one class: training by DeepSpeed, generation by vLLM."""
