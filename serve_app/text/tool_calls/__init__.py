"""Tool calls in the syntaxes of DeepSeek and Hermes/Qwen: parsing, grammars, prompts."""
