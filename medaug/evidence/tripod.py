"""The items of TRIPOD+AI: numbers and topics after Collins et al., BMJ 2024;385:e078378.

What an item asks is put in our own short words; the published text decides. 27 items, 52 with their parts. The outcome is
the class of an image and the only predictor is the image itself.
"""

from __future__ import annotations

from medaug.evidence import data_facts as data
from medaug.evidence import grading_facts as grading
from medaug.evidence import set_facts as made
from medaug.evidence.checklist_items import Checklist, Item

TRIPOD = Checklist(
    "TRIPOD+AI",
    "Collins et al., TRIPOD+AI statement: updated guidance for reporting clinical prediction models that use regression or machine "
    "learning methods, BMJ 2024;385:e078378, doi:10.1136/bmj-2023-078378",
    (
        Item("1", "Title", "Does the title name the prediction, its population and its outcome?", (), "title"),
        Item("2", "Abstract", "Does the abstract follow its own checklist?", (), "abstract"),
        Item("3a", "Background", "In which care is the model meant to help, and what exists?", (), "context and earlier models"),
        Item("3b", "Background", "For whom is it, and who would use it?", (), "target population and users"),
        Item("3c", "Background", "Which inequalities are known?", (), "health inequalities"),
        Item("4", "Objectives", "Is a model developed, evaluated or both?", (grading.arms,), "objectives"),
        Item(
            "5a",
            "Data",
            "Where do the data come from?",
            (data.source_cohort, made.described_set),
            "why these data represent the population",
        ),
        Item("5b", "Data", "From when are the data?", (), "dates of collection"),
        Item("6a", "Participants", "In which setting were they seen?", (), "number and place of centres"),
        Item("6b", "Participants", "Who was eligible?", (data.taken_in,), "criteria of eligibility"),
        Item("6c", "Participants", "Which treatments did they have?", (), "treatments, if they matter"),
        Item(
            "7",
            "Preparation",
            "How were data prepared and checked?",
            (data.preprocessing, data.deidentification, made.gate_checks),
        ),
        Item("8a", "Outcome", "What is predicted, and how was it determined?", (data.label_source,), "definition of every class"),
        Item("8b", "Outcome", "Who judged the outcome?", (data.rater_agreement,), "qualification of the readers"),
        Item("8c", "Outcome", "Was that judgement blinded?", (), "blinding of readers"),
        Item("9a", "Predictors", "How were predictors chosen?", (), "why images alone"),
        Item("9b", "Predictors", "How were predictors measured?", (data.acquisition,), "scanners and protocols"),
        Item("9c", "Predictors", "Who judged predictors?", (), "or that images are used as they are"),
        Item("10", "Sample size", "Why is the study this large?", (data.sizes,), "how the size was chosen"),
        Item("11", "Missing data", "What happened to missing data?", (data.missing_data,)),
        Item("12a", "Analysis", "How were data divided and used?", (data.split_assignment, data.split_level)),
        Item("12b", "Analysis", "In which form do predictors enter?", (data.preprocessing,)),
        Item(
            "12c",
            "Analysis",
            "Which model, built and tuned how?",
            (grading.networks, grading.classifier_training, grading.model_selection, made.model, made.training),
        ),
        Item("12d", "Analysis", "How were differences between clusters handled?", (), "centres, or that there was one"),
        Item("12e", "Analysis", "How is performance measured and compared?", (grading.metrics, grading.statistics)),
        Item("12f", "Analysis", "Was the model updated after evaluation?", (), "updating, or that there was none"),
        Item("12g", "Analysis", "How are predictions computed?", (grading.ensembling, grading.grading_version)),
        Item("13", "Class imbalance", "Were rare classes treated apart?", (grading.class_imbalance, data.class_counts)),
        Item("14", "Fairness", "What was done for fairness?", (), "approach to fairness, or that there was none"),
        Item("15", "Model output", "What does the model answer?", (grading.output,)),
        Item("16", "Training and evaluation", "How do training and test data differ?", (data.class_counts, grading.arms)),
        Item("17", "Ethics", "Who approved the study?", (), "ethics committee and consent"),
        Item("18a", "Open science", "Who paid, and with what role?", (), "funding"),
        Item("18b", "Open science", "Which interests conflict?", (), "conflicts of interest"),
        Item("18c", "Open science", "Where is the protocol?", (), "protocol, or that there was none"),
        Item("18d", "Open science", "Is the study registered?", (), "registration, or that there was none"),
        Item("18e", "Open science", "Can others have the data?", (made.described_set,), "address and conditions"),
        Item(
            "18f",
            "Open science",
            "Can others have the code?",
            (data.data_version, made.set_version),
            "address of the analysis code",
        ),
        Item("19", "Patients and public", "Were patients or the public involved?", (), "involvement, or that there was none"),
        Item("20a", "Participants", "How many went through the study?", (data.taken_in, data.sizes, data.class_counts)),
        Item("20b", "Participants", "Who are they?", (data.class_counts, data.patients), "age, sex and clinical facts"),
        Item(
            "20c",
            "Participants",
            "How do test and training data compare?",
            (data.class_counts, data.leak),
            "distributions of further facts",
        ),
        Item("21", "Development", "How many cases and outcomes has each analysis?", (grading.arms, data.test_set)),
        Item("22", "Specification", "What would others need to run the model?", (made.run_identity,), "address of the weights"),
        Item(
            "23a", "Performance", "What are the estimates, with intervals?", (grading.results, grading.comparisons), "subgroups"
        ),
        Item("23b", "Performance", "How does performance vary between clusters?", (), "centres, or that it was not examined"),
        Item("24", "Updating", "What did updating change?", (), "or that there was none"),
        Item("25", "Interpretation", "What do the results mean?", (), "interpretation"),
        Item("26", "Limitations", "What limits the study?", (data.leak, grading.warnings, made.gate_copies), "limitations"),
        Item("27a", "Use", "How are poor or missing images to be handled?", (), "handling in use"),
        Item("27b", "Use", "What must users do and know?", (), "interaction and expertise"),
        Item("27c", "Use", "What should be studied next?", (), "next steps"),
    ),
)
