"""GPT-2 inference on a CPU: one C++ file, compiled on the machine that it runs on."""
