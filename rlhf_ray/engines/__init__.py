"""The libraries that do the heavy work, each behind one class: DeepSpeed trains, vLLM or transformers generate."""
