"""The `quantization_config` of config.json, in the words of each library that writes one."""
