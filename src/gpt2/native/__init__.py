"""GPT-2 on a CPU without a framework in between: one C++ file, compiled on the machine it runs on."""
