"""Tools that inspect the installed library: doctor, kernel tables, roofline, launch tuning."""
