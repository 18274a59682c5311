"""What the macro is: its ADC, its description, its presets."""
