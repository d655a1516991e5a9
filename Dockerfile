# The course on a CPU, in a container. An NVIDIA GPU with TensorRT-LLM needs NVIDIA's own: compose.yaml.
#
#   docker build --tag course .
#   docker run --rm --publish 127.0.0.1:8888:8888 --volume course-work:/home/learner/course/work course
#
# The second starts JupyterLab; the log shows its address with the token. The volume keeps your copies of the notebooks.
#
# PIP_EXTRA_INDEX_URL may offer pip a CPU build of torch; without it pip takes the CUDA build, several GB more.

# What the course needs of a system; .devcontainer/ ends here.
FROM python:3.12-slim-trixie AS tools
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --shell /bin/bash learner
USER 1000
ENV PIP_NO_CACHE_DIR=1

FROM tools AS course
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /home/learner/course
COPY --chown=learner . .
# work/ is there so that a volume in its place is learner's.
RUN make setup && .venv/bin/helpers doctor && mkdir work
# For Binder and JupyterHub, which start their own command.
ENV PATH=/home/learner/course/.venv/bin:$PATH
EXPOSE 8888
CMD ["sh", "-c", "helpers course copy && exec jupyter lab --ip=0.0.0.0 --no-browser --notebook-dir=\"${COURSE_WORK:-work}\""]
