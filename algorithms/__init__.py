"""Losses, advantages, selection and schedules as the papers state them; no kernel, no device code."""
