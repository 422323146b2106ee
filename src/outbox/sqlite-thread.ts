import { parentPort, workerData, type MessagePort } from 'node:worker_threads'
import type { Project } from '../config.ts'
import { openDatabase, type Database } from './database.ts'
import { DirectoryInUse, type Counts, type Limits } from './outbox.ts'

/** A call of a method of the database. The thread answers calls one at a time, in their order. */
export interface Call { id: number, name: keyof Database, args: unknown[] }

/** The answer to a call; the first one, with the id 0, says whether the database is open. */
export interface Answer {
  id: number
  result?: unknown
  error?: { message: string, isInUse: boolean }
  counts?: Counts
}

export interface ThreadData { directory: string, project: Project, limits: Limits }

const port = parentPort as MessagePort
const { directory, project, limits } = workerData as ThreadData

function answer (id: number, work: () => unknown, counts: () => Counts | undefined): void {
  const reply: Answer = { id }
  try {
    reply.result = work()
    const now = counts()
    if (now !== undefined) reply.counts = now
  } catch (error) {
    reply.error = { message: (error as Error).message, isInUse: error instanceof DirectoryInUse }
  }
  port.postMessage(reply)
}

let database: Database | undefined
answer(0, () => { database = openDatabase(directory, project, limits) }, () => database?.counts())

port.on('message', ({ id, name, args }: Call) => {
  const method = database?.[name] as (...args: unknown[]) => unknown
  answer(id, () => method(...args), () => name === 'close' ? undefined : database?.counts())
  if (name === 'close') port.close()
})
if (database === undefined) port.close()
