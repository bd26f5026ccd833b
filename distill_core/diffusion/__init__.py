"""Noise processes, schedules and samplers."""
