"""Parts of several architectures: attention, layers, blocks of autoencoders, adapters, quantization, decoding."""
