"""The report: one HTML file and the same numbers in the tracker."""
