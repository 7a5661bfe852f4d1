"""Pure data: what is quantized how, where transforms may fold, what a device accepts. No torch, no onnx."""
