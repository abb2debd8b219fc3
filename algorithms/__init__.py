"""Losses, advantages, selection and schedules as the papers state them; no device code."""
