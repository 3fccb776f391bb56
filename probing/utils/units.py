"""Numbers with units."""


def si(number: float, unit: str) -> str:
    """Formats three digits with an SI prefix: 16.8 TFLOP."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:,.3g} E{unit}"
