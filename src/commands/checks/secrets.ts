import { readSecret } from '../../secrets.ts'
import { failed, ok, warning, type Finding } from './check.ts'

/** Checks that each file of a secret can be read again, as the relay does while it runs. */
export async function checkSecrets (files: [name: string, path: string][]): Promise<Finding> {
  const contents = await Promise.all(files.map(async ([name, path]) => ({ name, path, ...await readSecret(path) })))
  const broken = contents.filter(content => 'cause' in content)
  const text = broken.map(content => `${content.name}_FILE ${content.path}: ${content.cause}`).join('; ')
  if (broken.length === 0) return ok(contents.map(({ name, path }) => `${name}_FILE ${path} can be read`).join('; '))
  return broken.every(content => content.cause === 'not a regular file')
    ? warning(text, 'a pipe is read only at start, so a new secret needs a restart')
    : failed(text, 'the user of the relay must be able to read the file')
}
