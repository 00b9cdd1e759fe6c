"""The items of CLAIM, 2024 update: numbers and topics after Tejani et al., Radiology: Artificial Intelligence 2024;6(4):e240300.

What an item asks is put in our own short words; the published text decides. 44 items.
"""

from __future__ import annotations

from medaug.evidence import data_facts as data
from medaug.evidence import grading_facts as grading
from medaug.evidence import set_facts as made
from medaug.evidence.checklist_items import Checklist, Item

CLAIM = Checklist(
    "CLAIM 2024",
    "Tejani et al., Checklist for Artificial Intelligence in Medical Imaging (CLAIM): 2024 update, "
    "Radiology: Artificial Intelligence 2024;6(4):e240300, doi:10.1148/ryai.240300",
    (
        Item(
            "1",
            "Title",
            "Does the title say that AI is studied, and of which kind?",
            (grading.networks, made.generator_name),
            "title",
        ),
        Item("2", "Abstract", "Is the study summarised in a structured way?", (), "abstract"),
        Item("3", "Background", "Why is this needed, and what would the AI be used for?", (), "background and intended use"),
        Item("4", "Aims", "What does the study ask or test?", (), "aims and hypotheses"),
        Item("5", "Design", "Were data collected before or after the study began?", (), "prospective or retrospective"),
        Item("6", "Design", "What kind of study is it?", (grading.arms,), "goal of the study"),
        Item(
            "7",
            "Data",
            "Where do the data come from?",
            (data.source_cohort, data.sizes),
            "institutions, dates, other uses of the data",
        ),
        Item("8", "Data", "Who was included and who was not?", (data.taken_in,), "criteria by which patients were selected"),
        Item("9", "Data", "What was done to the images before training?", (data.preprocessing,), "steps before the export"),
        Item("10", "Data", "Were parts of images or series selected, and how?", (), "selection of slices, series or regions"),
        Item("11", "Data", "How was identity removed?", (data.deidentification,), "steps before the export"),
        Item("12", "Data", "What happened to missing data?", (data.missing_data,)),
        Item("13", "Data", "How were the images acquired?", (data.acquisition,), "scanners and protocols"),
        Item("14", "Reference standard", "How was the truth determined?", (data.label_source,), "definition of every class"),
        Item("15", "Reference standard", "Why this standard?", (), "reason for the choice"),
        Item(
            "16",
            "Reference standard",
            "Who annotated?",
            (made.gate_labels,),
            "number and qualification of the readers, their tools",
        ),
        Item("17", "Reference standard", "How was the test set annotated?", (data.test_set,), "annotation of the test set"),
        Item("18", "Reference standard", "How far do readers agree?", (data.rater_agreement,)),
        Item("19", "Partitions", "How were data assigned to partitions?", (data.split_assignment, data.class_counts)),
        Item("20", "Partitions", "At which level are partitions disjoint?", (data.split_level, data.leak)),
        Item("21", "Test data", "How many test cases are there, and why so many?", (data.test_set,), "how the size was chosen"),
        Item("22", "Model", "How is the model built?", (grading.networks, made.model, made.sampling)),
        Item(
            "23",
            "Model",
            "Which software was used, in which versions?",
            (data.data_version, made.set_version, grading.grading_version),
            "versions of Python, PyTorch, MONAI and the operating system",
        ),
        Item("24", "Model", "How did the weights begin?", (grading.initialisation,), "initial weights of the generator"),
        Item("25", "Training", "How was it trained?", (grading.arms, grading.classifier_training, made.training)),
        Item("26", "Training", "How was the final model chosen?", (grading.model_selection,)),
        Item("27", "Training", "Were models combined?", (grading.ensembling,)),
        Item("28", "Evaluation", "Which metrics measure performance?", (grading.metrics,)),
        Item("29", "Evaluation", "How are significance and uncertainty measured?", (grading.statistics,)),
        Item("30", "Evaluation", "How stable are the results?", (grading.robustness,)),
        Item("31", "Evaluation", "How are predictions explained?", (), "methods of explanation, or that there were none"),
        Item("32", "Evaluation", "What was measured on data of the same source?", (data.test_set, grading.results)),
        Item("33", "Evaluation", "What was measured on data from elsewhere?", (), "external test, or that there was none"),
        Item("34", "Evaluation", "Is a clinical trial registered?", (), "registration, or that it does not apply"),
        Item(
            "35",
            "Results, data",
            "How many were included and excluded?",
            (data.taken_in, data.sizes),
            "patients before the export",
        ),
        Item(
            "36", "Results, data", "Who is in each partition?", (data.class_counts, data.patients), "age, sex and clinical facts"
        ),
        Item("37", "Results, performance", "What are the metrics, with their uncertainty?", (grading.results,)),
        Item("38", "Results, performance", "How large are the effects, and how precise?", (grading.comparisons,)),
        Item("39", "Results, performance", "Which cases went wrong?", (grading.errors,), "what the wrong cases have in common"),
        Item("40", "Discussion", "What limits the study?", (data.leak, grading.warnings, made.gate_copies), "limitations"),
        Item("41", "Discussion", "What follows for practice?", (), "implications"),
        Item("42", "Other", "Where are protocol and technical details?", (made.run_identity,), "protocol"),
        Item(
            "43",
            "Other",
            "Where are software, model and data?",
            (made.described_set, made.run_identity),
            "addresses and conditions",
        ),
        Item("44", "Other", "Who paid, and with what role?", (), "funding"),
    ),
)
