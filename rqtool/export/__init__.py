"""The integer program as an ONNX file with metadata, its proof, and golden vectors. Only this
package imports onnx."""
