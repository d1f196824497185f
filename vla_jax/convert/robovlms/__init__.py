"""RoboVLMs: conversion of checkpoints, and settings for acting as its wrappers do."""
