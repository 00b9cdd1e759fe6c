"""From images and labels as a hospital or a public set delivers them to a cohort, with a report of what was left out."""
