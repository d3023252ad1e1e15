"""The gateway beside the article's own configuration, a one-tier nginx and HAProxy, in front of simulated GPUs."""
