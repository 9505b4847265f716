"Learners and policies: the tabular learners of ICU-Sepsis, compiled, many seeds side by side."
