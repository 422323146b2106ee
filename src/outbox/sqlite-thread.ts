import { workerData, type MessagePort } from 'node:worker_threads'
import type { Project } from '../config.ts'
import { answerCalls } from './answer-calls.ts'
import type { Limits } from './outbox.ts'

export interface ThreadData { port: MessagePort, directory: string, project: Project, limits: Limits }

const { port, directory, project, limits } = workerData as ThreadData
answerCalls(port, directory, project, limits)
