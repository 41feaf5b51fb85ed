"""From something that runs to a number one can defend, and a report one can mail.

``profile.profile`` checks and times subjects side by side and gives records and comparisons; ``record`` keeps them as
JSON lines; ``report.render_html`` and ``report.render_markdown`` show them. Several functions are named like their
module, so names are imported from the modules and not repeated here.
"""
