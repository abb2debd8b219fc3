"""Reports about the installed library: doctor, kernel tables, roofline, launch tuning."""
