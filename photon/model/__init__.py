"""The Photon network: Qwen2.5-VL's decoder and a 3D vision tower over packed, unpadded rows."""
