# An image with a model folder and its config: docs/operate/overlays.md has the commands. Build one for each
# target, because Serve checks the folder on the head, too.
ARG TARGET=gpu
FROM diffusion-serve:0.1.0-${TARGET}
# Name of the folder beside cluster/, and of its file in configs/.
ARG MODEL
COPY --chown=1000:0 ${MODEL} /models/${MODEL}
COPY configs/${MODEL}.yaml /app/configs/
RUN diffusion-serve check "/app/configs/${MODEL}.yaml"
