"""Training through the ADC: quantisers, the relaxed ADC, rewriting, calibration, fine-tuning."""
