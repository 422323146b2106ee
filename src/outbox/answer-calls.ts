import type { MessagePort } from 'node:worker_threads'
import type { Project } from '../config.ts'
import { OPENED, type Answer, type Call } from './calls.ts'
import { openDatabase, type Database } from './database.ts'
import { DirectoryInUse, type Limits } from './outbox.ts'

/** Opens the database and answers the calls on `port`, until it is closed. */
export function answerCalls (port: MessagePort, directory: string, project: Project, limits: Limits): void {
  let database: Database | undefined

  function answer (id: number, work: () => unknown): void {
    const reply: Answer = { id }
    try {
      reply.result = work()
      if (database !== undefined) reply.counts = database.counts()
    } catch (error) {
      reply.error = { message: (error as Error).message, isInUse: error instanceof DirectoryInUse }
    }
    port.postMessage(reply)
    if (database === undefined) port.close()
  }

  answer(OPENED, () => { database = openDatabase(directory, project, limits) })
  port.on('message', ({ id, name, args }: Call) => answer(id, () => {
    const method = database?.[name] as (...args: unknown[]) => unknown
    const result = method(...args)
    if (name === 'close') database = undefined
    return result
  }))
}
