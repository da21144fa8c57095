// A sketch that was NOT RUN: no phone was at hand.
// build.gradle: implementation("com.google.mediapipe:tasks-text:latest.release")

import android.content.Context
import com.google.mediapipe.tasks.text.textclassifier.TextClassifier

/** The score of each label for a text, by $file among the app's assets. */
fun classify(context: Context, text: String): Map<String, Float> =
    TextClassifier.createFromFile(context, "$file").use { classifier ->
        classifier.classify(text).classificationResult().classifications().first()
            .categories().associate { it.categoryName() to it.score() }
    }
