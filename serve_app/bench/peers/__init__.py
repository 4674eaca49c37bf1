"""`xeray bench peers`: engine and service beside llama.cpp, OpenVINO GenAI, transformers."""
